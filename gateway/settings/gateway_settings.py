"""Settings of the gateway, loaded and checked: `config/gateway.toml` shows every key with its default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cloud_sync.runtime import settings_file
from cloud_sync.runtime.secret_files import find_credential
from cloud_sync.runtime.settings_file import Fault, InvalidSettingsError
from gateway.ingress.committer import CommitterOptions
from gateway.settings.alerts import AlertSettings
from gateway.settings.destinations import AnyDestination, require_distinct_names
from gateway.settings.listeners import StatusSettings
from gateway.settings.processing import (
    CheckSettings,
    ClockSettings,
    DeadbandRule,
    ProcessingSettings,
    RollupSettings,
)
from gateway.settings.schema import (
    PORT_BOUND,
    Count,
    CountOrZero,
    DataPath,
    FileRole,
    Name,
    Reloadable,
    Restart,
    Seconds,
    Table,
)
from gateway.settings.sources import IngressSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENV_PREFIX = "TIDEGATE_GATEWAY_"


class SpoolSettings(Table):
    """The durable store."""

    path: Annotated[DataPath, Restart("the spool is open, and readings are in it")] = Field(
        examples=["/var/lib/tidegate/spool.db"]
    )
    """The SQLite file, on a local disk (not NFS). Its folder is created if necessary."""
    commit_interval_ms: Reloadable[Annotated[float, Field(ge=0, le=60_000)]] = 5
    """The shortest time between two commits. More saves flash, and delays acknowledgements by as much."""
    max_pending_bytes: Reloadable[Annotated[int, Field(ge=1 << 16)]] = 32 << 20
    """What may wait in memory for its commit. Beyond it sockets are not read (TCP back-pressure)."""
    max_series: Reloadable[Count] = 200_000
    """The limit of series, each counted once per state of its attributes. Readings of further series are
    quarantined.
    """
    max_bytes: Reloadable[Annotated[int, Field(ge=1 << 20)] | None] = Field(
        default=None, examples=[20_000_000_000]
    )
    """The largest size of the spool on disk. Default: only the disk is the limit."""
    min_free_bytes: Reloadable[CountOrZero] = 128 << 20
    """Space on the disk that stays free for others."""
    on_full: Reloadable[Literal["hold", "refuse"]] = "hold"
    """When the spool is full. "hold": withhold acknowledgements and stop reading, so that devices keep their
    data and send it later. "refuse": answer "quota exceeded", upon which devices discard it.
    """
    give_up: Reloadable[bool] = True
    """Whether the oldest undelivered readings are discarded when the spool is full; their rollups are kept,
    and the loss is declared. Without it a full spool accepts nothing more.
    """
    max_age_d: Reloadable[Seconds | None] = Field(default=None, examples=[60])
    """Older readings are discarded, delivered or not, and declared as lost. Default: no limit of age."""
    keep_delivered_h: Reloadable[Annotated[float, Field(ge=0)]] = 24
    """How long readings are kept after they are delivered everywhere. Undelivered ones are kept as long as
    there is room (`give_up`, `max_age_d`).
    """
    flash_endurance_tb: Seconds | None = Field(default=None, examples=[100])
    """What may still be written to the spool's disk: its rated endurance (TBW), less what has been written.
    With it the status page shows how many years that lasts.
    """

    @property
    def committer_options(self) -> CommitterOptions:
        """The options of the committer."""
        return CommitterOptions(
            interval_s=self.commit_interval_ms / 1000,
            max_pending_bytes=self.max_pending_bytes,
            refuse_when_full=self.on_full == "refuse",
        )


class GatewaySettings(BaseSettings):
    """The gateway's whole configuration."""

    model_config = SettingsConfigDict(extra="forbid", use_attribute_docstrings=True)

    gateway_id: Annotated[Name, Restart("deliveries are recorded under this name")] = Field(
        examples=["barn-1"]
    )
    """This gateway's name upstream, unique among all that deliver to the same place. Letters, digits, . _ -
    It must not change: deliveries are recorded under this name.
    """
    spool: SpoolSettings
    """A [spool] table: where readings are made durable before they are acknowledged."""
    ingress: IngressSettings = IngressSettings()
    """How readings enter."""
    clock: Annotated[ClockSettings, Restart("readings may be waiting for the clock under its settings")] = (
        ClockSettings()
    )
    """When the gateway's own clock is trusted."""
    checks: Reloadable[CheckSettings] = CheckSettings()
    """Which readings are flagged as suspicious."""
    report_by_exception: Reloadable[list[DeadbandRule]] = Field(default_factory=list)
    """Series of which only changes are delivered, one table each; the most specific pattern wins."""
    processing: Reloadable[ProcessingSettings] = ProcessingSettings()
    """How processing reads the commits."""
    rollups: RollupSettings = RollupSettings()
    """How readings are summarised."""
    alerts: Reloadable[AlertSettings] = AlertSettings()
    """The rules that raise alerts, and the channels that are notified."""
    destinations: Reloadable[Annotated[list[AnyDestination], AfterValidator(require_distinct_names)]] = Field(
        default_factory=list
    )
    """Where readings are sent, one table each. The progress of each is kept under its name."""
    status: Annotated[StatusSettings, PORT_BOUND] = StatusSettings()
    """The gateway's own HTTP endpoint."""
    stop_within_s: Reloadable[Seconds] = 20
    """How long an orderly stop may take. Keep it below TimeoutStopSec of the systemd unit."""
    log_level: Reloadable[Literal["debug", "info", "warning", "error"]] = "info"
    """The lowest level that is logged."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """The format of the log: text, JSON, or "auto": text, with priorities for systemd's journal."""

    @model_validator(mode="after")
    def _validate_rollup_rules(self) -> Self:
        windows_s = self.rollups.windows_s if self.rollups.enabled else []
        for rule in self.alerts.rule:
            if rule.on.startswith("rollup.") and rule.window_s not in windows_s:
                raise ValueError(
                    f"alerts.rule {rule.name}: there are no rollups of {rule.window_s} s; "
                    f"allowed for window_s: {', '.join(map(str, windows_s)) or 'none, rollups are off'}"
                )
        return self


def load_settings(path: Path) -> GatewaySettings:
    """Settings from a file and the environment; paths in it are relative to the file's own folder.

    The InvalidSettingsError has every fault, including files that are missing or cannot be used.
    """
    settings = parse_settings_file(path)
    faults = [
        Fault(str(path), f"{place}.{fault.key}", fault.what, fault.allowed)
        for place, table in _walk_tables(settings)
        for fault in table.check_files()
    ]
    if faults:
        raise InvalidSettingsError(faults)
    return settings


def parse_settings_file(path: Path) -> GatewaySettings:
    """The same without checking the files that the settings name, for commands that write them."""
    settings = settings_file.load_settings(GatewaySettings, path, ENV_PREFIX)
    folder = path.absolute().parent
    for _, table in _walk_tables(settings):
        for key, role, value in list(table.list_files()):
            setattr(table, key, folder / value)
            if role is FileRole.SECRET and (copy := find_credential(folder / value)) != folder / value:
                table.replace_path(key, copy)
    return settings


def list_files(settings: GatewaySettings, *roles: FileRole) -> Iterator[tuple[str, Path]]:
    """Key and path of every file of these roles that an enabled table names."""
    for place, table in _walk_tables(settings, enabled_only=True):
        for key, _, path in table.list_files(*roles):
            yield f"{place}.{key}", path


def _walk_tables(
    value: object, place: str = "", *, enabled_only: bool = False
) -> Iterator[tuple[str, Table]]:
    """Every table with its key; entries of lists by position, or with `enabled_only` by name."""
    if isinstance(value, list):
        for position, entry in enumerate(value):
            label = getattr(entry, "name", None) or getattr(entry, "url", None) if enabled_only else None
            yield from _walk_tables(entry, f"{place}[{label or position}]", enabled_only=enabled_only)
    elif isinstance(value, BaseModel) and (not enabled_only or getattr(value, "enabled", True)):
        if isinstance(value, Table):
            yield place, value
        for name, inner in value:
            yield from _walk_tables(inner, f"{place}.{name}" if place else name, enabled_only=enabled_only)
