"""Images as weights: a generator turns an image's features into low-rank changes of a language model.

Ma et al., Visual Perception by Large Language Model's Weights (VLoRA, NeurIPS 2024, arXiv 2405.20339), section 3;
reference repository FeipengMa6/VLoRA.
"""
