"""Where people are told: one file a kind of channel."""
