"""Where models come from: names, weight files, tokenizers, the families' shapes, and the decoder as a torch module.

One file a family, one reader a format. Readers treat every file as hostile: sizes are checked before they are trusted,
no class is ever resolved from a name in a file, and no pickle is opened. Only `decoder` imports PyTorch.
"""
