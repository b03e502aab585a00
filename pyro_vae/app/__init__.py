"""The command line, the demonstration, and the pages they write."""
