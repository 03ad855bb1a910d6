//! Processes are killed and replaced while two users type: no message is lost, repeated or out of order on their pages.

use e2e::{Browser, Front, browser::BrowserContext};

use super::{
    messenger::{Messenger, Talk, assert_all_show},
    site::{Site, site_of},
};
use crate::support::Two;

const QUICK: [(&str, &str); 3] =
    [("SHUTDOWN_WAIT_SECONDS", "0"), ("DRAIN_WAIT_SECONDS", "0"), ("DRAIN_WINDOW_SECONDS", "1")];

struct Typists {
    two: Two,
    john: Messenger,
    jane: Messenger,
    janes_other: Messenger,
    _contexts: [BrowserContext; 3],
}

impl Typists {
    async fn sit_down(browser: &Browser, site: &Site) -> Self {
        let two = Two::meet(&site.world, site.api()).await;
        let mut contexts = Vec::new();
        for (who, user) in [("john", &two.john), ("jane", &two.jane), ("jane's other", &two.jane)] {
            let context = browser.context(who, &site.origin).await;
            context.sign_in(user).await;
            // A broken stream, and requests to a process that has just died.
            context.expect("Failed to load resource");
            contexts.push(context);
        }
        Self {
            john: Messenger::at(&contexts[0], two.conversation).await,
            jane: Messenger::at(&contexts[1], two.conversation).await,
            janes_other: Messenger::at(&contexts[2], two.conversation).await,
            two,
            _contexts: contexts.try_into().ok().unwrap(),
        }
    }

    async fn type_while(&self, site: &mut Site, trouble: impl AsyncFnOnce(&mut Site, &Talk)) {
        let (world, talk) = (site.world.clone(), Talk::default());
        let trouble = async {
            talk.more(6).await;
            trouble(site, &talk).await;
            talk.more(6).await;
            talk.end();
        };
        tokio::join!(self.john.go_on_saying(&world, &talk), self.jane.go_on_saying(&world, &talk), trouble);
        let watching =
            [(&self.two.john, &self.john), (&self.two.jane, &self.jane), (&self.two.jane, &self.janes_other)];
        assert_all_show(&world, self.two.conversation, &watching).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_gateways_leave_each_message_on_screen_once() {
    let browser = Browser::launch().await;
    let mut site = site_of(Front::plain(), [1, 2], &QUICK).await;
    let typists = Typists::sit_down(&browser, &site).await;
    typists
        .type_while(&mut site, async |site, talk| {
            // One, so that all are at the other; then that one.
            site.gateways[0].kill();
            talk.more(10).await;
            site.gateways[0].restart().await;
            site.gateways[1].kill();
            talk.more(10).await;
            site.gateways[1].restart().await;
            // For a moment there is none: a browser's own stream would give up.
            site.gateways[0].kill();
            site.gateways[1].kill();
            talk.more(10).await;
            site.gateways[0].restart().await;
            site.gateways[1].restart().await;
        })
        .await;
    assert!(site.metric("messenger_gateway_streams_opened_total").await >= 3.0, "all three came back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_deploy_while_both_type_is_not_an_event() {
    let browser = Browser::launch().await;
    let mut site = site_of(Front::plain(), [2, 2], &QUICK).await;
    let typists = Typists::sit_down(&browser, &site).await;
    typists
        .type_while(&mut site, async |site, talk| {
            for service in site.apis.iter_mut().chain(&mut site.gateways) {
                service.redeploy("LOG_FORMAT", "json").await;
                talk.more(6).await;
            }
        })
        .await;
    for page in [&typists.john, &typists.jane, &typists.janes_other] {
        assert_eq!(page.css("[data-failed]").count().await, 0);
    }
}
