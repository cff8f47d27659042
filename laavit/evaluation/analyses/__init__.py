"""The paper's analyses (LaViT, arXiv 2601.10129: Table 2, Fig. 2-5) for any models and any data with boxes.

Each one reads models on samples, and gives plain data: every figure as ``[mean, low, high]`` (95 %, over samples), and
None where a figure has nothing to stand on. ``laavit.reports.analysis_figures`` draws that data, and nothing else.
"""
