"""A procedural world of captioned scenes: coloured shapes on muted backgrounds.

A scene is one to three shapes on a 64x64 canvas whose background (gradient, stripes, checks or clouds) no prompt ever
mentions, so that most of an image is something the reward does not look at.
"""
