// A host with node-postgres: the event is published when its transaction commits, or never.
import pg from "pg";

const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL });

async function pay(order, receiver, cardWorks = true) {
  const client = await pool.connect();
  try {
    await client.query("BEGIN");
    await client.query("INSERT INTO shop_orders (id, state) VALUES ($1, 'paid')", [order]);
    const publish = "SELECT messenger.publish($1::bigint, 'order.paid', $2::jsonb, $3)";
    await client.query(publish, [receiver, { order }, `order-${order}`]);
    if (!cardWorks) throw new Error("the card was declined");
    await client.query("COMMIT");
  } catch (error) {
    await client.query("ROLLBACK");
    throw error;
  } finally {
    client.release();
  }
}

await pay(1, process.env.RECEIVER);
await pay(2, process.env.RECEIVER, false).catch((error) => console.log(error.message));
await pool.end();
