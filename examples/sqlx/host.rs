// A host with sqlx: the event is published when its transaction commits, or never.
use sqlx::{Error, PgPool};

const INSERT: &str = "INSERT INTO shop_orders (id, state) VALUES ($1, 'paid')";
const PUBLISH: &str =
    "SELECT messenger.publish($1::bigint, 'order.paid', jsonb_build_object('order', $2::bigint), $3)";

async fn pay(pool: &PgPool, order: i64, receiver: i64, card_works: bool) -> Result<(), Error> {
    let mut transaction = pool.begin().await?; // rolled back when it is dropped
    sqlx::query(INSERT).bind(order).execute(&mut *transaction).await?;
    let publish = sqlx::query(PUBLISH).bind(receiver).bind(order).bind(format!("order-{order}"));
    publish.execute(&mut *transaction).await?;
    if !card_works {
        return Err(Error::Protocol("the card was declined".into()));
    }
    transaction.commit().await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
    let receiver = std::env::var("RECEIVER")?.parse()?;
    pay(&pool, 1, receiver, true).await?;
    if let Err(error) = pay(&pool, 2, receiver, false).await {
        println!("{error}");
    }
    Ok(())
}
