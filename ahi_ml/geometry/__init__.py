"""Where voxels lie in the patient, floor 1: frames sorted into stacks, and the affine of a stack.

`grid` holds the geometry of a stack, `grouping` finds the frames of a series that could make one, and `stacking`
puts them in order. Holds no pixels, no resampling and no reading of tags: it works on numbers that the metadata
floor parsed. Millimetres and patient LPS throughout (x to the left, y to posterior, z to the head).
"""

from ahi_ml.geometry.grid import Geometry, reorient
from ahi_ml.geometry.grouping import Group, group_frames
from ahi_ml.geometry.stacking import Stack, stack_frames

__all__ = ["Geometry", "Group", "Stack", "group_frames", "reorient", "stack_frames"]
