"""The demo: a real model and a real text, prepared once from their packages."""
