//! The whole product at one origin.

use std::sync::Arc;

use e2e::{Front, Service, World, nginx::Nginx, service::Plan};
use futures_util::future::join_all;

/// In the order in which it is torn down.
#[allow(dead_code, reason = "some are only held")]
pub(crate) struct Site {
    pub(crate) nginx: Nginx,
    pub(crate) gateways: Vec<Service>,
    pub(crate) apis: Vec<Service>,
    pub(crate) world: Arc<World>,
    pub(crate) origin: String,
}

/// One api and two gateways, with these settings.
pub(crate) async fn site(front: Front, settings: &[(&str, &str)]) -> Site {
    site_of(front, [1, 2], settings).await
}

/// So many apis and gateways. All get these settings and know only theirs.
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
}
