"""An hour without etcd, by a clock that jumps: nobody misses what is warm, and all is as before afterwards."""

import asyncio
from contextlib import ExitStack

from tests.kit.cluster_world import ADDRESSES, ClusterWorld, drawn_cluster
from tests.kit.processes import ProcessLoop
from tests.kit.world import Site, run_virtually

KINDS = ("load.started", "unloaded", "evicted")


def events(site: Site) -> list[tuple[str, str]]:
    return [(event["kind"], event["model"]) for event in site.studio.log(0) if event["kind"] in KINDS]


def cold(world: ClusterWorld) -> list[set[str]]:
    """What each member gives to nobody, though it is wanted; that is what `/readyz` names."""
    return [
        {model.id.key for model in member.keeper.snapshot().models if model.wanted and not model.given}
        for member in world.living()
    ]


def test_an_hour_without_etcd_costs_nobody_a_warm_model_and_is_told_in_one_line():
    async def go() -> None:
        world = drawn_cluster(8, sound=True)
        world.ttl, world.tick = 60.0, 15.0
        site = world.sites[0]
        lost = site.models[0].key
        for machine in world.machines:
            world.begin(machine)
        traffic = asyncio.ensure_future(world.traffic())
        await world.well_again("the beginning", world.first_time())
        for member in world.living():
            member.told.clear()
        before = events(site)

        with ExitStack() as stack:
            stack.enter_context(world.etcd_well.ill())
            for address in ADDRESSES:
                world.etcd.set(address, "hangs")
            for minute in range(60):
                await asyncio.sleep(60.0)
                world.check()
                if minute == 30:
                    site.studio.evict(lost)
                # It shows with the next listing.
                if minute != 30:
                    assert cold(world) == [{lost} if minute > 30 else set()] * len(world.living())
            during = events(site)[len(before) :]
            assert [dict(member.told) for member in world.living()] == [{"cluster.engine_down": 1}] * len(
                world.living()
            )
            for address in ADDRESSES:
                world.etcd.set(address, "up")
        await world.well_again("etcd", world.within(["etcd away"]))
        told = [member.told["cluster.engine_up"] for member in world.living()]
        assert told == [1] * len(world.living())
        after = events(site)[len(before) + len(during) :]
        traffic.cancel()
        for machine in world.machines:
            await world.end(machine, killed=True)
        await world.end_users()
        world.etcd.stop()
        assert after == [("load.started", lost)]
        assert during == [("evicted", lost)]

    run_virtually(go, ProcessLoop)
