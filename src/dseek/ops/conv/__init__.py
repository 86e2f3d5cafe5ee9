"""Convolutions of integers: inputs rounded to steps, int8 weights with one scale an output channel.

`packing` lays out the weight, `dispatch` convolves with it, `reference` says in plain PyTorch what must come out.
Linear layers whose inputs have given steps, not those of their own largest values, are convolutions of images of one
pixel.
"""
