"""What an AdminClient sees: everybody's usage, storage and audit log."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tinker

from tests.mesh.sdk.data import learn
from tests.mesh.sdk.declared import DEPRECATED_TOO, means
from tests.mesh.sdk.test_rest_client import this_hour, until
from tests.mesh.sdk.world import User, World, wait

pytestmark = DEPRECATED_TOO


@pytest.fixture
def boss(world: World) -> Iterator[User]:
    with world.user(admin=True) as found:
        yield found


def admin_client(user: User) -> tinker.AdminClient:
    return tinker.AdminClient(base_url=user.world.url, api_key=user.key)


@means(
    "an administrator's key sees every tenant's usage, storage and audit entries; any other key its own alone",
    "AdminClient.get_billing_usage",
    "AdminClient.get_billing_usage_async",
    "AdminClient.get_current_checkpoint_storage_usage",
    "AdminClient.get_current_checkpoint_storage_usage_async",
    "AdminClient.get_audit_log",
    "AdminClient.get_audit_log_async",
    "AdminClient.get_telemetry",
)
def test_administrators_see_what_everybody_used_and_did(user: User, boss: User) -> None:
    training = user.train()
    learn(training, 1)
    path = training.save_state("one").result().path
    user.rest.publish_checkpoint_from_tinker_path(path).result()
    all_of_it, own, nothing = admin_client(boss), admin_client(user), admin_client(boss)
    begin, end = this_hour()

    def usage() -> bool:
        events = all_of_it.get_billing_usage(begin, end).result().data
        return any(each.user_name == user.tenant and each.event_info.type == "training" for each in events)

    until(usage)
    mine = wait(own.get_billing_usage_async(begin, end)).data
    assert {each.user_name for each in mine} == {user.tenant}
    stored = all_of_it.get_current_checkpoint_storage_usage().result().data
    assert [each.checkpoint_count for each in stored if each.user_name == user.tenant] == [1]
    assert {each.user_name for each in wait(own.get_current_checkpoint_storage_usage_async()).data} == {user.tenant}
    entries = all_of_it.get_audit_log("checkpoints").result().entries
    assert (path, "checkpoint_published") in [(each.tinker_path, each.event) for each in entries]
    seen = wait(own.get_audit_log_async("checkpoints")).entries
    assert [each.event for each in seen] == ["checkpoint_published"]
    telemetry = nothing.get_telemetry()
    assert telemetry is not None
    assert telemetry.log("something")
