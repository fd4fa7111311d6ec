"""Can a benchmark report be true?"""
