import ArgumentParser
import QMP

/// Who may migrate to this VM, and how its migrations are encrypted.
struct SecurityOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "Make an object for TLS, such as tls-creds-x509,id=tls0,dir=PATH,endpoint=server; may be repeated.",
            valueName: "type,id=id,..."))
    var object: [String] = []

    @Option(help: ArgumentHelp("Encrypt migrations with the credentials of this id.", valueName: "id"))
    var tlsCreds: String?

    @Option(
        help: ArgumentHelp("Admit only sources on the list of this id (authz-simple, authz-list).", valueName: "id"))
    var tlsAuthz: String?

    @Flag(help: "Allow to wait for a migration without TLS where other machines reach it.")
    var insecurePlaintext = false

    /// The migration parameters that say so.
    var parameters: [String: JSON] {
        var parameters: [String: JSON] = [:]
        if let tlsCreds { parameters["tls-creds"] = .string(tlsCreds) }
        if let tlsAuthz { parameters["tls-authz"] = .string(tlsAuthz) }
        return parameters
    }
}
