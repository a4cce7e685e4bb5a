"""The query parameters that HTTP accepts; an unknown one is an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from matcher_service.gateway.json_bodies import INT64_MAX

PAGE_DEFAULT = 100
PAGE_MAX = 1000


class NoQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Page(NoQuery):
    limit: int = Field(PAGE_DEFAULT, ge=1, le=PAGE_MAX, description="Most items of one page.")


class PageAfterName(Page):
    after: str = Field("", description="The next_after of the page before.")


class PageAfterIndex(Page):
    after: int = Field(0, ge=0, le=INT64_MAX, description="The next_after of the page before.")


class AlertPage(Page):
    deployment_id: str = Field("", description="Empty: of all deployments.")
    before: str = Field("", description="The next_before of the page before.")


class Reason(NoQuery):
    reason: str = Field("", description="Required: why. It goes into the audit.")


class ReasonInGallery(Reason):
    gallery_id: str = Field("", description="Empty: in every gallery.")
