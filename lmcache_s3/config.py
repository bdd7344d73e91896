"""All settings of the cache: one frozen schema, from code, environment and a YAML file.

Precedence: keyword arguments (also vLLM's `kv_connector_extra_config` and the command line's options), then
`LMCACHE_S3_<NAME>`, then the YAML file (`settings_file`, else `LMCACHE_S3_CONFIG`), then the defaults. Unknown names
are errors everywhere (in the environment only near misses: schedulers put variables of their own there).

`load_settings` raises `Invalid` (setting) with one line that names the setting, the value and the mend. No I/O but
reading the YAML file; nothing heavy is imported until a method needs it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from lmcache_s3 import config_fields as fields
from lmcache_s3.codecs.registry import CODEC_IDS, make_codec
from lmcache_s3.config_fields import Count, Number, Size
from lmcache_s3.config_sources import ENV_PREFIX, FILE_VARIABLE, check_environment, read_file, variable_of
from lmcache_s3.errors import Invalid

if TYPE_CHECKING:
    from lmcache_s3.codecs.base import JSON, KVCodec
    from lmcache_s3.index.gc import GcSettings
    from lmcache_s3.index.service import IndexSettings
    from lmcache_s3.resting import RestingTier
    from lmcache_s3.tiers.base import Tier
    from lmcache_s3.tiers.eviction.admission import SecondTouch
    from lmcache_s3.tiers.eviction.base import EvictionPolicy
    from lmcache_s3.tiers.stores.open import StoreOptions
    from lmcache_s3.transfer import TransferSettings

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Settings(BaseSettings):
    """Where the cache lies, what it may use, and what it promises. Sizes take units (`512MiB`, `4GB`), times are in
    seconds."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_ignore_empty=True, env_parse_none_str="null"
    )

    # --- where ----------------------------------------------------------------------------------------------------
    url: str = fields.field(
        ...,
        "Root of the cache: `s3://bucket/prefix`, `file:///path`, `memory://name`, or any fsspec URL (`gs://` …). "
        "Everyone who shares it shares the cache.",
        what="a URL",
        mend="write for example s3://bucket/prefix",
        min_length=1,
    )
    endpoint_url: str | None = fields.text(
        "Address of an S3-compatible service; left out, AWS. Each request pays the round trip to it.",
        "write for example http://127.0.0.1:9000",
    )
    region: str | None = fields.text(
        "Region of the bucket. Reading from another region costs $0.02/GB and tens of milliseconds a request on AWS.",
        "write for example eu-central-1",
    )
    addressing_style: Literal["auto", "path", "virtual"] = fields.field(
        "auto",
        "How S3 buckets are addressed; most self-hosted services want `path`. Costs nothing.",
        what="auto, path or virtual",
        mend="write path for a self-hosted service",
    )
    ca_bundle: Path | None = fields.field(
        None,
        "File of CA certificates that the endpoint's certificate is checked against. Costs nothing.",
        what="a path",
        mend="name a PEM file",
    )
    profile: str | None = fields.text(
        "Profile in the AWS configuration files to take credentials from. Costs nothing.", "name a profile"
    )
    requester_pays: bool = fields.switch(
        "Agree to pay for requests and transfer where the bucket's owner does not: $0.0004 per 1,000 reads, and what "
        "AWS charges for transfer out of its region."
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed on to fsspec for URLs that it opens (not s3:// or file://). Costs nothing.",
        json_schema_extra={"what": "a mapping", "mend": 'write for example {"token": "anon"}'},
        repr=False,
    )

    # --- what is stored -------------------------------------------------------------------------------------------
    codec: str = fields.field(
        "fast",
        "How KV is coded in the bucket: `fast`, `torch`, `safetensors` are exact and cost its full size; `lossless` is "
        "exact at two thirds of it, for some processor time; `cachegen` is lossy, several times smaller, and shares "
        "nothing with exact caches; `transform` is smaller still and needs `lmcache-s3 calibrate`, once a model.",
        what="a codec",
        mend=f"choose one of {', '.join(CODEC_IDS)}",
    )
    codec_level: str | None = fields.text(
        "Setting of a lossy codec; left out, the codec's own. Coarser is smaller and further from the exact answer.",
        "leave it out for the codec's own",
    )
    codec_calibration: str | None = fields.field(
        None,
        "Digest of the calibration that codec `transform` stores with; left out, the one that `lmcache-s3 calibrate` "
        "wrote last for this model into the bucket. Read once a process, some megabytes.",
        what="64 hex digits",
        mend="leave it out for the model's own",
    )
    max_kl: Number | None = fields.field(
        None,
        "Worst next-token KL divergence admitted, nats per token: refuses codecs that nobody measured to be as good. "
        "Each bound is a space of its own, so changing it starts an empty cache.",
        what="a number above 0",
        mend="write for example 0.02",
        gt=0,
        allow_inf_nan=False,
    )
    chunk_tokens: Count = fields.field(
        256,
        "Tokens per chunk, the unit of matching; a multiple of the engine's block size. Smaller chunks waste fewer "
        "tokens at the end of a match (half a chunk a prompt) and cost more index (about 33 bytes each). Changing it "
        "starts an empty cache.",
        what="a whole number from 1 to 65536",
        mend="write for example 256",
        ge=1,
        le=65_536,
    )
    head_groups: Count | None = fields.field(
        None,
        "Groups of KV heads stored as separate objects; left out, the writer's tensor-parallel size. More groups cost "
        "a PUT each per extent, and let ranks of a larger fleet read only their own heads.",
        what="a whole number above 0",
        mend="leave it out for the tensor-parallel size",
        ge=1,
        le=1024,
    )
    extent_bytes: Size = fields.size(
        "256MiB", "Largest object written. Larger extents cost fewer PUTs ($5 per million on AWS) and more memory each."
    )
    store_min_tokens: Count = fields.field(
        0,
        "Prompts shorter than this are not stored. Storing costs 3 PUTs and the prompt's KV in bytes.",
        what="a whole number, 0 or more",
        mend="write for example 512",
        ge=0,
    )
    admission: Literal["all", "second_touch"] = fields.field(
        "all",
        "Which chunks this process stores: `all`, or only those it has computed before. On a public chat trace the "
        "latter writes a quarter and keeps three fifths of the reuse. It remembers two million chunks or so, in 6 MB.",
        what="all or second_touch",
        mend="write for example all",
    )
    weights_digest: str | None = fields.field(
        None,
        "SHA-256 that stands for the model's weights; left out, it is computed once from the files (the cache is off "
        "until then). Stated wrongly, it serves wrong KV.",
        what="64 hex digits",
        mend="leave it out to have it computed",
    )

    # --- tiers and memory -----------------------------------------------------------------------------------------
    device_bytes: Size | None = fields.budget(
        None, "Device memory for stored cells, taken from what the engine could use; null: no such tier."
    )
    host_bytes: Size | None = fields.budget(
        "1GiB", "Host memory for stored cells, in each engine process; null: every load goes to disk or bucket."
    )
    disk_bytes: Size | None = fields.budget(
        None,
        "Local disk for stored cells, in each engine process, needs `disk_path`; null: no such tier. Its reads keep "
        "up to 64 MiB of host memory, outside every budget.",
    )
    disk_path: Path | None = fields.field(
        None,
        "Directory of the disk tier, on a fast local disk; a network disk costs what the bucket costs.",
        what="a path",
        mend="write for example /var/cache/lmcache-s3",
    )
    staging_bytes: Size = fields.size(
        "512MiB",
        "Most host memory for KV on its way in or out; what was needed once is kept for the next time. Where it does "
        "not suffice, stores are dropped first.",
    )
    prefetch: Literal["off", "queued", "next_turn"] = fields.field(
        "queued",
        "What is brought from the bucket into the nearest of host and disk tier before the engine asks: `off`, "
        "nothing; `queued`, KV of requests that wait in its queue (a GET that would come anyway, unless the request is "
        "given up); `next_turn`, also that of prompts just answered, which costs GETs for chats that never come back.",
        what="off, queued or next_turn",
        mend="write for example queued",
    )
    write_behind_s: Number = fields.field(
        0.0,
        "How long chunks of a growing prompt may rest in host memory, so that a chat's turns go up as one extent: "
        "saves PUTs (3 an extent), costs the other engines that long until they see them, and a crash what rests. An "
        "idle engine uploads at once. 0: nothing rests.",
        what="a number of seconds, 0 or more",
        mend="write for example 60",
        ge=0,
        allow_inf_nan=False,
    )
    write_behind_bytes: Size = fields.size(
        "1GiB",
        "Most host memory for chunks that rest, in each engine process; beyond it the oldest go up at once. Not less "
        "than `extent_bytes`.",
    )
    io_threads: Count = fields.field(
        16,
        "Most requests at once for loads, in each process (half as many for stores), and threads that code; how many "
        "requests the store is worth is learnt. More hide the latency of a far store.",
        what="a whole number from 1 to 256",
        mend="write for example 16",
        ge=1,
        le=256,
    )

    # --- time -----------------------------------------------------------------------------------------------------
    poll_s: Number = fields.seconds(
        2.0, "How often others' work is looked for. One GET each time: 2 s cost $0.018 a day and instance on AWS."
    )
    hand_over_s: Number = fields.seconds(
        2.0,
        "In a busy fleet one instance writes the index for all; the others give it their work so often at most. One "
        "PUT each time: 2 s cost up to $0.22 a day and instance on AWS, 0.5 s four times that, and others see stores "
        "1.5 s sooner.",
    )
    merge_s: Number = fields.seconds(
        1.0,
        "How often that one writes. A LIST, a PUT and 3 GETs each time, of one instance: 1 s costs $0.97 a day for the "
        "whole fleet.",
    )
    access_s: Number = fields.seconds(
        3600.0,
        "How often hits are told to all, for eviction by last access. One PUT at most each time; a longer pause evicts "
        "less exactly.",
    )
    load_deadline_s: Number = fields.seconds(30.0, "A load that takes longer is given up and the engine computes.")
    store_deadline_s: Number = fields.seconds(
        60.0, "A store that takes longer is dropped; its KV is computed again some day."
    )
    connect_timeout_s: Number = fields.seconds(
        5.0, "Longest wait for a connection; a dead store costs a load this much."
    )
    request_timeout_s: Number = fields.seconds(30.0, "Longest wait for one request's answer.")

    # --- what is kept: read by `lmcache-s3 gc` ----------------------------------------------------------------------
    bucket_bytes: Size | None = fields.limit(
        "Most bytes of one space's KV in the bucket; beyond it goes what was used least lately. A TB costs $23 a month "
        "on AWS. null: no limit."
    )
    tenant_bytes: dict[str, Size] = Field(
        default_factory=dict,
        description='The same for single tenants, by `cache_salt`: `{"team-a": "100GiB"}`.',
        json_schema_extra={"what": "a mapping from cache_salt to a size", "mend": 'write for example {"a": "100GiB"}'},
        repr=False,
    )
    default_tenant_bytes: Size | None = fields.limit("The same for each other tenant. null: no limit.")
    ttl_s: Number | None = fields.long(
        None, "What was not used for so long goes. What a prompt continues counts as used with it. null: no limit."
    )
    gc_grace_s: Number = fields.long(
        3600.0,
        "How long an upload may take until its commit. Slower ones are lost (and counted); garbage stays that long.",
    )
    history_s: Number = fields.long(
        604_800.0,
        "How far back `lmcache-s3 log` and `ls --as-of` reach. Costs the index's versions and some checkpoints of that "
        "time in storage.",
    )

    # --- sharing --------------------------------------------------------------------------------------------------
    read_only: bool = fields.switch("Load only: nothing is stored, no permission to write is needed.")
    single_writer: bool = fields.switch(
        "Admit a store without put-if-absent: the operator promises that one process at a time writes. Two writers "
        "lose each other's entries."
    )

    @field_validator("prefetch", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, value: str) -> str:
        if value not in CODEC_IDS:
            raise ValueError(fields.unknown(value, "codec", CODEC_IDS))
        return value

    @field_validator("codec_calibration")
    @classmethod
    def _a_calibration(cls, value: str | None) -> str | None:
        if value is not None and _SHA256.fullmatch(value) is None:
            raise ValueError(f"{value[:80]!r} is not 64 hex digits; leave it out for the model's own")
        return value

    @field_validator("weights_digest")
    @classmethod
    def _sha256(cls, value: str | None) -> str | None:
        if value is not None and _SHA256.fullmatch(value) is None:
            raise ValueError(f"{value[:80]!r} is not 64 hex digits; leave it out to have it computed")
        return value

    @field_validator("device_bytes", "host_bytes", "disk_bytes")
    @classmethod
    def _not_nothing(cls, value: ByteSize | None) -> ByteSize | None:
        if value == 0:
            raise ValueError("0 would keep nothing; leave it out (null) to switch this tier off")
        if value is not None and value < fields.LEAST_BYTES:
            raise ValueError(fields.too_few(value, "hold no chunk of any model", "4GiB"))
        return value

    @field_validator("bucket_bytes", "default_tenant_bytes", "tenant_bytes")
    @classmethod
    def _not_by_mistake(cls, value: ByteSize | dict[str, ByteSize] | None) -> ByteSize | dict[str, ByteSize] | None:
        for one in value.values() if isinstance(value, dict) else (value,):
            if one is not None and 0 < one < fields.LEAST_BYTES:
                raise ValueError(fields.too_few(one, "would have everything removed", "1TiB"))
        return value

    @model_validator(mode="after")
    def _disk_is_whole(self) -> Settings:
        if self.disk_bytes is not None and self.disk_path is None:
            raise ValueError(
                f"disk_path: missing; disk_bytes: {self.disk_bytes} needs a directory, say /var/cache/lmcache-s3"
            )
        if self.disk_path is not None and self.disk_bytes is None:
            raise ValueError(f"disk_bytes: missing; disk_path: '{self.disk_path}' needs a budget, for example 100GiB")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword arguments, environment, YAML file. No .env and no secrets directory."""
        assert isinstance(init_settings, InitSettingsSource)
        named = init_settings.init_kwargs.pop("settings_file", None) or os.environ.get(FILE_VARIABLE)
        from_file = read_file(Path(named)) if named else {}
        return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    def store_options(self) -> StoreOptions:
        """For `open_store(settings.url, options=…)`."""
        from lmcache_s3.tiers.stores.open import StoreOptions

        return StoreOptions(
            endpoint_url=self.endpoint_url,
            region=self.region,
            addressing_style=self.addressing_style,
            ca_bundle=None if self.ca_bundle is None else str(self.ca_bundle),
            profile=self.profile,
            storage_options=self.storage_options,
            connect_timeout_s=self.connect_timeout_s,
            request_timeout_s=self.request_timeout_s,
            max_connections=max(32, 2 * self.io_threads),
            requester_pays=self.requester_pays,
        )

    def make_codec(self) -> KVCodec:
        """The codec to store with. Raises `Invalid` for a level it does not have or a package that is missing."""
        config: dict[str, JSON] = {} if self.codec_level is None else {"level": self.codec_level}
        if self.codec_calibration is not None:
            config["calibration"] = self.codec_calibration
        return make_codec(self.codec, config)

    def index_settings(self) -> IndexSettings:
        from lmcache_s3.index.service import IndexSettings

        return IndexSettings(
            poll_s=self.poll_s,
            hand_over_s=self.hand_over_s,
            merge_s=self.merge_s,
            access_s=self.access_s,
            read_only=self.read_only,
            single_writer=self.single_writer,
        )

    def gc_settings(self) -> GcSettings:
        from lmcache_s3.index.gc import GcSettings

        return GcSettings(
            grace_s=self.gc_grace_s,
            history_s=self.history_s,
            max_bytes=self.bucket_bytes,
            ttl_s=self.ttl_s,
            tenant_bytes=dict(self.tenant_bytes),
            default_tenant_bytes=self.default_tenant_bytes,
        )

    def transfer_settings(self) -> TransferSettings:
        from lmcache_s3.transfer import TransferSettings

        return TransferSettings(
            staging_bytes=self.staging_bytes,
            io_threads=self.io_threads,
            load_deadline_s=self.load_deadline_s,
            store_deadline_s=self.store_deadline_s,
        )

    def make_admission(self) -> SecondTouch | None:
        """Who decides what is worth storing; None: all is."""
        from lmcache_s3.tiers.eviction.admission import SecondTouch

        return SecondTouch() if self.admission == "second_touch" else None

    def make_resting(self) -> RestingTier | None:
        """Where chunks rest before they are uploaded; None if nothing may rest."""
        from lmcache_s3.resting import RestingTier

        return RestingTier(self.write_behind_bytes) if self.write_behind_s > 0 else None

    def make_tiers(self, space_id: str, owner: str) -> list[Tier]:
        """The tiers in front of the bucket, fast → slow, as budgeted.

        owner: names this process's part of `disk_path` (its rank, say), where two processes cannot share one. space_id:
        names the model's part of it. Raises `Invalid` for a path or device that cannot be used.
        """
        from lmcache_s3.tiers.eviction.hazard import HazardPolicy

        tiers: list[Tier] = []
        if self.device_bytes is not None:
            tiers.append(_device_tier(self.device_bytes, HazardPolicy(), self.chunk_tokens))
        if self.host_bytes is not None:
            from lmcache_s3.tiers.host import HostTier

            tiers.append(HostTier(self.host_bytes, eviction=HazardPolicy(), chunk_tokens=self.chunk_tokens))
        if self.disk_bytes is not None and self.disk_path is not None:
            from lmcache_s3.tiers.disk import DiskTier

            path = self.disk_path / space_id[:16] / owner
            tiers.append(DiskTier(path, self.disk_bytes, eviction=HazardPolicy(), chunk_tokens=self.chunk_tokens))
        return tiers


def _device_tier(budget_bytes: int, eviction: EvictionPolicy, chunk_tokens: int) -> Tier:
    try:
        from lmcache_s3.tiers.device import DeviceTier
    except ModuleNotFoundError as e:
        raise Invalid(
            f"device_bytes: {budget_bytes} needs torch; pip install 'lmcache-s3[torch]' or leave device_bytes out",
            kind="setting",
            key="device_bytes",
        ) from e
    try:
        return DeviceTier(budget_bytes, eviction=eviction, chunk_tokens=chunk_tokens)
    except Invalid as e:
        raise Invalid(
            f"device_bytes: {budget_bytes} needs a GPU ({e}); leave device_bytes out",
            kind="setting",
            key="device_bytes",
        ) from e


def load_settings(**arguments: Any) -> Settings:
    """The settings in force; see the module for where they come from. `settings_file=`: the YAML file.

    Raises `Invalid` (setting), one line.
    """
    check_environment(Settings.model_fields)
    try:
        return Settings(**arguments)
    except ValidationError as e:
        raise fields.invalid(e, Settings.model_fields) from e
    except SettingsError as e:
        raise Invalid(f"{variable_of(e)}: its value is not JSON; write a JSON object", kind="setting") from e


def settings_table() -> str:
    """Every setting as a Markdown table: name, default, what it does and costs."""
    lines = ["| setting | default | what it does, and what it costs |", "|---|---|---|"]
    for name, info in Settings.model_fields.items():
        default = "required" if info.is_required() else _default_text(info.get_default(call_default_factory=True))
        lines.append(f"| `{name}` | {default} | {(info.description or '').replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _default_text(value: object) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value is None:
        return "–"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
