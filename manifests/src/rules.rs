//! All rules. Each returns sentences; none for a sound set.

mod ending;
mod environment;
mod network;
mod parts;
mod probes;
mod quantities;
mod routing;
mod scaling;
mod security;
mod words;

use crate::{
    Installation,
    set::{Container, Pod},
    settings::Service,
};

pub type Rule = fn(&Installation) -> Vec<String>;

pub const ALL: [Rule; 23] = [
    ending::ends_fit_into_the_grace_period,
    ending::gateways_part_one_after_the_other,
    environment::variables_are_settings,
    environment::what_must_be_set_is_set,
    environment::values_can_be_read,
    environment::secrets_are_referred_to,
    network::flows_are_those_that_are_needed,
    parts::names_are_unique_and_in_the_namespace,
    parts::the_product_is_whole,
    parts::selectors_select,
    parts::ports_exist,
    parts::references_lead_somewhere,
    parts::files_are_mounted,
    probes::probes_ask_operators_ports,
    quantities::quantities_make_sense,
    routing::the_ingress_routes_the_stream_and_nothing_more,
    scaling::numbers_of_replicas_make_sense,
    scaling::autoscalers_measure_what_exists,
    scaling::pods_are_spread_and_guarded,
    security::pods_are_restricted,
    security::a_program_has_one_image,
    security::nothing_secret_is_in_the_set,
    words::words_are_known,
];

impl Installation {
    /// The containers that run a binary of ours.
    fn ours(&self) -> impl Iterator<Item = (Container<'_>, &Service)> {
        let containers = self.set.pods().into_iter().flat_map(Pod::containers);
        containers.filter_map(|container| Some((container, self.services.get(container.program())?)))
    }

    /// Those that serve, not the one that migrates.
    fn serving(&self) -> impl Iterator<Item = (Container<'_>, &Service)> {
        self.ours().filter(|(container, _)| container.command() == "serve")
    }
}

/// A setting as a number, or its default.
fn number(container: &Container, service: &Service, name: &str) -> Option<u64> {
    let set = container.value(name).or_else(|| service.settings.get(name).cloned().flatten());
    set?.parse().ok()
}
