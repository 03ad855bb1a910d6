//! The whole product at one origin.

use std::sync::Arc;

use e2e::{Browser, Front, Service, TestUser, World, browser::BrowserContext, nginx::Nginx, service::Plan};
use futures_util::future::join_all;

/// In the order of teardown.
pub(crate) struct Site {
    pub(crate) nginx: Nginx,
    pub(crate) gateways: Vec<Service>,
    pub(crate) apis: Vec<Service>,
    pub(crate) world: Arc<World>,
    pub(crate) origin: String,
}

pub(crate) async fn site(front: Front, settings: &[(&str, &str)]) -> Site {
    site_of(front, [1, 2], settings).await
}

pub(crate) async fn site_of(front: Front, [apis, gateways]: [usize; 2], settings: &[(&str, &str)]) -> Site {
    let origin = front.origin();
    let world = Arc::new(World::at(&origin).await);
    let set = |plan: Plan| settings.iter().fold(plan, |plan, (name, value)| plan.env(name, value));
    let apis = join_all((0..apis).map(|_| set(world.api()).ready())).await;
    let gateway = |number: usize| set(world.gateway(apis[number % apis.len()].internal())).ready();
    let gateways = join_all((0..gateways).map(gateway)).await;
    let nginx = front.open(&Vec::from_iter(&apis), &Vec::from_iter(&gateways)).await;
    Site { nginx, gateways, apis, world, origin }
}

impl Site {
    pub(crate) fn api(&self) -> &Service {
        &self.apis[0]
    }

    /// The sum over all gateways.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        join_all(self.gateways.iter().map(|gateway| gateway.metric(series))).await.iter().sum()
    }

    pub(crate) async fn signed_in(&self, browser: &Browser, user: &TestUser) -> BrowserContext {
        let context = browser.context(&user.name, &self.origin).await;
        context.sign_in(user).await;
        context
    }
}
