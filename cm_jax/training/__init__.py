"""Training: the state, the step, and what makes a run survive and be seen."""
