"""The fleet: engines that answer prompts, the weights that they serve, and what an answer is worth."""
