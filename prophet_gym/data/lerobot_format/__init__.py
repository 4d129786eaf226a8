"""Episodes on disk in the LeRobot dataset format v3.0, written and read with pyarrow alone.

A data set is one folder::

    data/chunk-000/file-000.parquet            one file per episode here; other writers may put many in a file
    videos/<key>/chunk-000/file-000.mp4        only where the images are stored with dtype "video"
    meta/info.json                             written last: without it the data set is not finalized
    meta/stats.json, meta/tasks.parquet
    meta/episodes/chunk-000/file-000.parquet

LeRobot's own loader reads it. An :class:`~prophet_gym.data.episode.Episode` of T + 1 frames is T + 1 rows. The
``action`` of row k is the block of ``frame_stride`` actions executed between frame k and frame k + 1, flattened. The
last row has no such block: it holds a no-op (zero motion, the last gripper command) and is not part of
``Episode.actions``. ``next.success`` of row k is the verdict at frame k, so that each row is one moment; other software
means frame k + 1 by it, and so does :class:`EpisodeDataset` where other software wrote the data set.

What the format has no place for is kept under the key ``prophet`` of ``info.json`` (frame stride, camera, orientation,
the meaning of an action, one record per episode) and in ``prophet/...`` columns of ``meta/episodes``.
"""

from prophet_gym.data.lerobot_format.reader import EpisodeDataset, ForeignFields, check_video
from prophet_gym.data.lerobot_format.schema import EpisodeRecord
from prophet_gym.data.lerobot_format.writer import LeRobotWriter

__all__ = ["EpisodeDataset", "EpisodeRecord", "ForeignFields", "LeRobotWriter", "check_video"]
