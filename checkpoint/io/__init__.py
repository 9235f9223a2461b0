"""Threads, pages of memory and blocks of bytes."""
