"""`make accuracy`: one model compressed by many methods, all given the same text, and scored alike."""
