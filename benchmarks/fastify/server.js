// The same API with Fastify and pg: schemas for requests and responses, prepared statements.
import cluster from "node:cluster";
import Fastify from "fastify";
import pg from "pg";

const { DATABASE_URL, DATABASE_POOL_SIZE, PORT, WEB_CONCURRENCY } = process.env;

const name = { type: "string" };
const age = { type: "integer", nullable: true };
const id = { type: "integer" };
const members = { type: "object", additionalProperties: false, properties: { name, age, secret_name: name } };
const hero = { type: "object", properties: { name, age, id } };
const response = { 200: hero };
const params = { type: "object", properties: { id } };
const querystring = {
  type: "object",
  properties: {
    offset: { type: "integer", minimum: 0, default: 0 },
    limit: { type: "integer", maximum: 100, default: 100 },
  },
};

async function serve() {
  pg.types.setTypeParser(pg.types.builtins.INT8, Number);
  // Idle connections stay open, as in the other contestants.
  const pool = new pg.Pool({ connectionString: DATABASE_URL, max: Number(DATABASE_POOL_SIZE), idleTimeoutMillis: 0 });
  const rows = async (name, text, values) => (await pool.query({ name, text, values })).rows;
  const one = async (name, text, values) => {
    const [row] = await rows(name, text, values);
    if (!row) throw Object.assign(new Error("Hero not found"), { statusCode: 404 });
    return row;
  };
  const read = (id) => one("read", "SELECT name, age, id FROM hero WHERE id = $1", [id]);

  const app = Fastify();
  app.setErrorHandler((error, request, reply) =>
    reply
      .code(error.validation ? 422 : error.statusCode ?? 500)
      .send({ detail: error.validation ?? error.message }),
  );
  app.post("/heroes/", { schema: { body: { ...members, required: ["name", "secret_name"] }, response } }, ({ body }) =>
    one(
      "create",
      "INSERT INTO hero (name, age, secret_name) VALUES ($1, $2, $3) RETURNING name, age, id",
      [body.name, body.age, body.secret_name],
    ),
  );
  app.get("/heroes/", { schema: { querystring, response: { 200: { type: "array", items: hero } } } }, ({ query }) =>
    rows("list", "SELECT name, age, id FROM hero ORDER BY id OFFSET $1 LIMIT $2", [query.offset, query.limit]),
  );
  app.get("/heroes/:id", { schema: { params, response } }, ({ params }) => read(params.id));
  app.patch("/heroes/:id", { schema: { params, body: members, response } }, ({ params, body }) => {
    const columns = Object.keys(body);
    if (!columns.length) return read(params.id);
    const changes = columns.map((column, index) => `${column} = $${index + 2}`).join(", ");
    return one(
      `update ${columns}`,
      `UPDATE hero SET ${changes} WHERE id = $1 RETURNING name, age, id`,
      [params.id, ...Object.values(body)],
    );
  });
  await app.listen({ host: "127.0.0.1", port: Number(PORT) });
}

if (cluster.isPrimary) {
  for (let worker = 0; worker < Number(WEB_CONCURRENCY); worker++) cluster.fork();
} else {
  await serve();
}
