"""FIPO inside unmodified slime: its flags in slime's parser, its weights in slime's Megatron policy loss.

``arguments`` needs no slime until it is asked to extend slime's parser; ``loss`` imports slime and megatron-core.
"""
