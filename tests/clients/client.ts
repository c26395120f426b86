// Use the generated types on the service at this URL.
import createClient from "openapi-fetch";

import type { components, paths } from "./heroes.js";

declare const process: { argv: string[] };

function check(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

const client = createClient<paths>({ baseUrl: process.argv[2]! });

const created = await client.POST("/heroes/", {
  params: { header: { "idempotency-key": "key" } },
  body: { name: "Deadpond", secret_name: "Dive Wilson" },
});
const hero: components["schemas"]["HeroPublic"] | undefined = created.data;
check(hero !== undefined && hero.age === null, "the hero was not created");

const params = { path: { hero_id: hero.id } };
const etag = created.response.headers.get("ETag")!;
const update = { params: { ...params, header: { "if-match": etag } }, body: { age: 48 } };
const changed = await client.PATCH("/heroes/{hero_id}", update);
check(changed.data?.age === 48, "the hero was not changed");
const stale = await client.PATCH("/heroes/{hero_id}", update);
check(stale.response.status === 412 && stale.error !== undefined, "a stale ETag was accepted");

const page = await client.GET("/heroes/", { params: { query: { sort: "-age", limit: 10 } } });
check(page.data?.map((each) => each.age).join() === "48", "the list is wrong");
const deleted = await client.DELETE("/heroes/{hero_id}", { params });
check(deleted.data?.ok === true, "the hero was not deleted");
const missing = await client.GET("/heroes/{hero_id}", { params });
check(missing.data === undefined && missing.error !== undefined, "the hero is still there");

// @ts-expect-error: the types refuse a sort key that the service does not have.
await client.GET("/heroes/", { params: { query: { sort: "power" } } });
