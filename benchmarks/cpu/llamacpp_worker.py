"""A process with one model in llama.cpp on one thread. Runs in llama.cpp's own environment: nothing else is there."""

import ctypes
import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks.protocol import serve

__all__ = ["prepare"]

PROMPT = 32
_LARGEST_BATCH = 16
_CONTEXT = 4 * PROMPT


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Load the model, or quantise a file; see :func:`benchmarks.protocol.serve`.

    Args:
        settings: ``file``; or ``file``, ``target`` and ``ftype`` (a number of llama.cpp) to quantise.
    """
    import llama_cpp  # noqa: PLC0415

    llama_cpp.llama_backend_init()
    start = time.monotonic()
    if "target" in settings:
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.allow_requantize = 1, settings["ftype"], True
        status = llama_cpp.llama_model_quantize(
            settings["file"].encode(), settings["target"].encode(), ctypes.byref(params)
        )
        return {"status": status}, lambda question: question
    model = llama_cpp.llama_model_load_from_file(settings["file"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {settings['file']}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = _LARGEST_BATCH * _CONTEXT
    params.n_batch = params.n_ubatch = _LARGEST_BATCH * PROMPT
    params.n_seq_max = _LARGEST_BATCH
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    weights = llama_cpp.llama_model_n_params(model)
    decoder = Decoder(llama_cpp, context, vocabulary)
    ready = {
        "seconds": time.monotonic() - start,
        "bits_per_weight": 8 * llama_cpp.llama_model_size(model) / weights,
        "weights": weights,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    return ready, lambda question: decoder.measure(question["batch"], question["tokens"])


class Decoder:
    """Feeds random tokens to several sequences at once, as llama.cpp's own benchmark does."""

    def __init__(self, library: Any, context: Any, vocabulary: int) -> None:  # noqa: ANN401 - ctypes
        self._library = library
        self._context = context
        self._vocabulary = vocabulary
        self._batch = library.llama_batch_init(_LARGEST_BATCH * PROMPT, 0, 1)
        self._draw = random.Random(0)

    def measure(self, sequences: int, tokens: int) -> dict[str, Any]:
        """Read a prompt for each sequence, then go on a token each at a time; seconds of both."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        prefill = self._decode([(s, p) for s in range(sequences) for p in range(PROMPT)])
        steps = tokens - 1
        decode = sum(self._decode([(s, PROMPT + step) for s in range(sequences)]) for step in range(steps))
        return {"prefill": prefill, "decode": decode, "steps": steps}

    def _decode(self, places: list[tuple[int, int]]) -> float:
        """Seconds to compute one token at each (sequence, position); with the logits of each sequence's last."""
        batch = self._batch
        batch.n_tokens = len(places)
        last = dict(places)
        for i, (sequence, position) in enumerate(places):
            batch.token[i] = self._draw.randrange(10, self._vocabulary)
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = position == last[sequence]
        start = time.perf_counter()
        status = self._library.llama_decode(self._context, batch)
        self._library.llama_synchronize(self._context)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}")
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(prepare)
