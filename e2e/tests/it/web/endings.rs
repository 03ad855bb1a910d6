//! After a session ends, every tab shows the login page and none of the user's data.

use e2e::{Browser, Front, TestUser};
use futures_util::future::join_all;
use protocol::claims::Claims;
use serde_json::json;
use testkit::until;

use super::{
    messenger::{Messenger, assert_all_show},
    site::site,
};
use crate::support::Two;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_goes_on_while_it_is_used() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    let context = site.signed_in(&browser, &two.jane).await;
    let jane = Messenger::at(&context, two.conversation).await;
    // From here on with a token that expires soon, of a session that does not.
    let now: i64 =
        sqlx::query_scalar("SELECT extract(epoch FROM now())::bigint").fetch_one(&world.sql).await.unwrap();
    let token = world.sign(&Claims { exp: now + 8, ..world.claims(&two.jane) });
    context.sign_in(&TestUser { cookie: world.cookie(&token), token, ..two.jane.clone() }).await;
    jane.reload().await;
    until("the stream has ended with its token", || async {
        site.metric("messenger_gateway_streams_closed_total{reason=\"expired\"}").await >= 1.0
    })
    .await;
    assert_all_show(world, two.conversation, &[(&two.jane, &jane)]).await;
    assert_eq!(jane.role("button", "Log in").count().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_that_outslept_its_session_shows_the_login() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let two = Two::meet(&site.world, site.api()).await;
    let context = site.signed_in(&browser, &two.jane).await;
    context.expect("status of 401");
    let jane = Messenger::at(&context, two.conversation).await;
    jane.freeze().await;
    let ended = sqlx::query(
        "UPDATE messenger.sessions SET expires_at = now() - interval '1 second' WHERE user_id = $1",
    );
    ended.bind(two.jane.id.0).execute(&site.world.sql).await.unwrap();
    // The browser has dropped the expired cookie.
    context.call(json!([["clearCookies"]])).await;
    jane.thaw().await;
    jane.shows_login().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_ended_from_another_device_ends_on_all_tabs() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let two = Two::meet(&site.world, site.api()).await;
    let (laptop, phone) =
        (browser.context("laptop", &site.origin).await, browser.context("phone", &site.origin).await);
    phone.expect("status of 401");
    laptop.sign_in(&two.jane).await;
    let phones = site.world.login(site.api(), "jane").await;
    phone.sign_in(&phones).await;
    let tabs = [
        Messenger::at(&phone, two.conversation).await,
        Messenger::open(&phone, "/").await,
        Messenger::open(&phone, "/sessions").await,
    ];

    let sessions = Messenger::open(&laptop, "/sessions").await;
    assert_eq!(site.metric("messenger_gateway_streams").await, 2.0, "all tabs of a browser share one stream");
    let session = site.world.claims(&phones).sid.unwrap();
    let row = sessions.css(&format!("li[data-session-id='{}']", session.0));
    row.clone().css("button").click().await;
    join_all(tabs.iter().map(Messenger::shows_login)).await;
    row.disappears().await;
    sessions.live().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logout_in_one_tab_logs_out_this_browser_only() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let two = Two::meet(&site.world, site.api()).await;
    let (laptop, phone) =
        (browser.context("laptop", &site.origin).await, browser.context("phone", &site.origin).await);
    laptop.expect("status of 401");
    laptop.sign_in(&two.jane).await;
    phone.sign_in(&site.world.login(site.api(), "jane").await).await;
    let elsewhere = Messenger::at(&phone, two.conversation).await;
    let tabs = [Messenger::at(&laptop, two.conversation).await, Messenger::open(&laptop, "/").await];
    tabs[1].role("button", "Log out").click().await;
    join_all(tabs.iter().map(Messenger::shows_login)).await;
    tabs[0].reload().await;
    tabs[0].shows_login().await;
    assert_all_show(&site.world, two.conversation, &[(&two.jane, &elsewhere)]).await;
}
