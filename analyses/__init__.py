"""One thin script a question: load, run, save, plot."""
