"""Tests of reading and fetching weights."""
