"""What measures the bound: evidence, gap, quality."""
