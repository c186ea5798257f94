"""Every setting of a run, as frozen pydantic schemas.

This package imports neither torch nor ray; validating the settings of a component imports that component's module.

A run is one YAML file plus ``--set section.field=value`` overrides. Unknown or ill-typed fields are refused with
the field, the value and the nearest valid name; a combination that no code path supports is refused here, before
anything starts. Validators reject, they never rewrite.
"""

from mlc_ray.config.asking import GREEDY, AskingSection
from mlc_ray.config.base import (
    ConfigError,
    Fraction,
    LanguageTag,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunName,
    Section,
    apply_override,
    config_schema,
    dump_yaml,
    load_config,
    parse_config,
    parse_yaml,
    read_config_file,
    refuse_credentials,
)
from mlc_ray.config.calibration import CalibrationConfig
from mlc_ray.config.chat import PLAIN_CHAT, ChatSection
from mlc_ray.config.data import DataSection, SourceSection
from mlc_ray.config.logs import LoggedSection, LogSection
from mlc_ray.config.model import LoraSection, ModelSection
from mlc_ray.config.objective import (
    AnswerSettings,
    LossSettings,
    ObjectiveConfig,
    TapSection,
    TermSettings,
    resolve_layer,
)
from mlc_ray.config.openings import OpeningsSection
from mlc_ray.config.scale import ScaleConfig, SizeSection
from mlc_ray.config.score import (
    TRANSLATION_MARKERS,
    EndpointSection,
    EngineSection,
    JudgeSettings,
    ReadingJudgeSettings,
    ScoreConfig,
    ScoringSection,
    TranslateSection,
    TranslatorSection,
    UtilityConfig,
    UtilityEngineSection,
    UtilitySection,
)
from mlc_ray.config.search import ConfirmSection, ObjectiveSettings, ParameterSection, ProbePriorSection, SearchConfig
from mlc_ray.config.simulation import SimulationConfig
from mlc_ray.config.study import DECIDED, UNTOUCHED, StudyConfig, StudyModelSection
from mlc_ray.config.train import (
    CheckpointSection,
    ClusterSection,
    CollapseSection,
    EngineSettings,
    LoggingSection,
    OptimizerSection,
    TrainConfig,
    TrainSection,
)
from mlc_ray.config.translate import ChecksSection, OnPolicySection, TranslateConfig, TwinsSection

__all__ = [
    "DECIDED",
    "GREEDY",
    "PLAIN_CHAT",
    "TRANSLATION_MARKERS",
    "UNTOUCHED",
    "AnswerSettings",
    "AskingSection",
    "CalibrationConfig",
    "ChatSection",
    "CheckpointSection",
    "ChecksSection",
    "ClusterSection",
    "CollapseSection",
    "ConfigError",
    "ConfirmSection",
    "DataSection",
    "EndpointSection",
    "EngineSection",
    "EngineSettings",
    "Fraction",
    "JudgeSettings",
    "LanguageTag",
    "LogSection",
    "LoggedSection",
    "LoggingSection",
    "LoraSection",
    "LossSettings",
    "ModelSection",
    "NonNegativeInt",
    "ObjectiveConfig",
    "ObjectiveSettings",
    "OnPolicySection",
    "OpeningsSection",
    "OptimizerSection",
    "ParameterSection",
    "PositiveFloat",
    "PositiveInt",
    "ProbePriorSection",
    "ReadingJudgeSettings",
    "RunName",
    "ScaleConfig",
    "ScoreConfig",
    "ScoringSection",
    "SearchConfig",
    "Section",
    "SimulationConfig",
    "SizeSection",
    "SourceSection",
    "StudyConfig",
    "StudyModelSection",
    "TapSection",
    "TermSettings",
    "TrainConfig",
    "TrainSection",
    "TranslateConfig",
    "TranslateSection",
    "TranslatorSection",
    "TwinsSection",
    "UtilityConfig",
    "UtilityEngineSection",
    "UtilitySection",
    "apply_override",
    "config_schema",
    "dump_yaml",
    "load_config",
    "parse_config",
    "parse_yaml",
    "read_config_file",
    "refuse_credentials",
    "resolve_layer",
]
