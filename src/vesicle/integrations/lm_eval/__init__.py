"""The lm-evaluation-harness on our engine; its public door is `vesicle.evaluation.lm_eval`."""
