"""`make load`: a server under load and abuse."""
