"""`compare_outputs`: how far two images or videos are apart, in numbers and as a picture.

`frames` reads images and videos of any form, `metrics` has the numbers, `sheet` draws the picture, and `compare` puts
them together.
"""
