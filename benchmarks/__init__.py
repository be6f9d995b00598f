"""Side-by-side measurements, one file a question. Not installed."""
