"""Serving OffQ checkpoints: the demo, and the server process that it talks to."""
