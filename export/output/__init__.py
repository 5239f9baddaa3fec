"""Where exports work and what they may replace."""
