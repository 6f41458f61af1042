"""How good a model is: perplexity of texts, loss on data as for training, accuracy on multiple-choice questions.

score.py computes log-probabilities, evaluate.py the figures, files.py reads what is measured; harness.py lets
lm-evaluation-harness run our models (extra `harness`). phi3-evaluate uses these modules.
"""
