"""From a prompt to an answer: passes, sampling, reuse."""
