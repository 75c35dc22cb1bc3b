"""`mode = "segments"`: a frozen language model forecasts series of numbers, a whole segment at each position.

Liu et al., AutoTimes: Autoregressive Time Series Forecasters via Large Language Models (NeurIPS 2024, arXiv
2402.02370); reference repository thuml/AutoTimes. A series is cut into segments of S numbers; a map S -> D makes each
an input embedding, the frozen model runs over them, a map D -> S makes its output the next segment. Nothing of the
vocabulary takes part: this is no Fourier head, and shares with it only the purpose.

Deviations. The loss is measured on windows normalised by their own mean and deviation; the reference code puts the
predictions back on the scale of a data set that was standardised as a whole, which data of several scales is not. The
text of a time stamp is ours. Embeddings of stamps are computed by the same model when they are needed, not beforehand.
"""
