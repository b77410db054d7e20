"""``cggr study``: arms and controls at equal tokens, equal kept tokens and equal time, over several seeds."""

from cggr_train.study.run import resume_study, start_study
from cggr_train.study.settings import StudySettings

__all__ = ["StudySettings", "resume_study", "start_study"]
