"""Use the generated client on the service at this URL."""

import sys

from heroes_client import Client
from heroes_client.api.heroes import create_hero, delete_hero, read_hero, read_heroes, update_hero
from heroes_client.models import (
    Deleted,
    Error,
    HeroCreate,
    HeroPublic,
    HeroUpdate,
    ReadHeroesSort,
)


def main() -> None:
    with Client(base_url=sys.argv[1], raise_on_unexpected_status=True) as client:
        created = create_hero.sync_detailed(
            client=client,
            body=HeroCreate(name="Deadpond", secret_name="Dive Wilson"),
            idempotency_key="key",
        )
        hero = created.parsed
        assert isinstance(hero, HeroPublic)
        assert (hero.name, hero.age) == ("Deadpond", None)

        etag = created.headers["ETag"]
        changed = update_hero.sync(hero.id, client=client, body=HeroUpdate(age=48), if_match=etag)
        assert isinstance(changed, HeroPublic)
        assert changed.age == 48
        stale = update_hero.sync_detailed(
            hero.id, client=client, body=HeroUpdate(age=1), if_match=etag
        )
        assert stale.status_code == 412
        assert isinstance(stale.parsed, Error)

        page = read_heroes.sync(client=client, sort=ReadHeroesSort("-age"), limit=10)
        assert page == [changed]
        assert read_hero.sync(hero.id, client=client) == changed
        deleted = delete_hero.sync(hero.id, client=client)
        assert isinstance(deleted, Deleted)
        missing = read_hero.sync(hero.id, client=client)
        assert isinstance(missing, Error)
        assert missing.detail == "Hero not found"


main()
