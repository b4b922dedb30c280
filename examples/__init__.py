"""Programs to run: ``python -m examples.demo`` shows the library at work."""
