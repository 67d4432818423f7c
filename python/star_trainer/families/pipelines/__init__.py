"""One file for each kind of pipeline, and what they share."""
