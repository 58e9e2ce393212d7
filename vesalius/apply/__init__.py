"""Models put to use: text written under rules."""
