"""One HTML page about a detector: its figures, where its errors come from, and the images they are in. Knows no model."""
