//! The hosts of `examples`, as they are there: a stream receives what each of them has committed, and nothing else.

use std::process::{Command, Stdio};

use e2e::{World, clients};
use serde_json::json;
use testkit::soon;

use crate::support::ready;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_receives_exactly_what_each_example_commits() {
    let hosts = tokio::task::spawn_blocking(|| {
        [
            ("node-postgres", Some(clients::node_example("node-postgres", "host.mjs"))),
            ("sqlalchemy", clients::python_example("sqlalchemy", "host.py")),
            ("sqlx", Some(Command::new(env!("CARGO_BIN_EXE_sqlx-host")))),
        ]
    });
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    for (name, host) in hosts.await.unwrap() {
        let Some(mut host) = host else { continue };
        let user = world.user(&api, name).await;
        let mut stream = ready(gateway.stream(&user)).await;
        let table = "DROP TABLE IF EXISTS shop_orders; CREATE TABLE shop_orders (id bigint PRIMARY KEY, state text NOT NULL)";
        sqlx::raw_sql(table).execute(&world.sql).await.unwrap();

        host.env("DATABASE_URL", world.database_url()).env("RECEIVER", user.id.to_string());
        host.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let ran = tokio::task::spawn_blocking(move || host.output().unwrap()).await.unwrap();
        let said = String::from_utf8([ran.stdout, ran.stderr].concat()).unwrap();
        assert!(ran.status.success() && said.contains("the card was declined"), "{name}: {said}");

        let last = sqlx::query("SELECT messenger.publish($1::bigint, 'last', NULL)").bind(user.id.0);
        last.execute(&world.sql).await.unwrap();
        let paid = soon("the event of the transaction that committed", stream.named("order.paid")).await;
        assert_eq!(paid.json(), json!({ "order": 1 }), "{name}");
        assert!(paid.id.is_some(), "{name}: it is in the feed");
        soon("nothing in between", stream.named("last")).await;
        let orders: Vec<i64> =
            sqlx::query_scalar("SELECT id FROM shop_orders").fetch_all(&world.sql).await.unwrap();
        assert_eq!(orders, [1], "{name}");
    }
}
