"""Long measurements, run by hand or by a make target."""
