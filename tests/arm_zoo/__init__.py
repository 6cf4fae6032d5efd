"""Tests of arm_zoo."""
