/// A command's refusal as QMP carries it: `{"class": ..., "desc": ...}`.
public struct QMPError: Error, Hashable, Sendable, CustomStringConvertible {
    /// What programs may depend on. All but a few errors are `GenericError`.
    public struct Class: RawRepresentable, Hashable, Sendable {
        public let rawValue: String
        public init(rawValue: String) { self.rawValue = rawValue }
        public static let generic = Class(rawValue: "GenericError")
        public static let commandNotFound = Class(rawValue: "CommandNotFound")
        public static let deviceNotFound = Class(rawValue: "DeviceNotFound")
        public static let deviceNotActive = Class(rawValue: "DeviceNotActive")
        public static let kvmMissingCapability = Class(rawValue: "KVMMissingCap")
    }

    public let errorClass: Class
    /// One sentence for people.
    public let description: String

    public init(_ description: String, class errorClass: Class = .generic) {
        self.errorClass = errorClass
        self.description = description
    }

    /// Any error as the one a client sees: `QMPError` as it is, another as `GenericError` with its own words.
    public init(_ error: any Error) {
        self = error as? QMPError ?? QMPError("\(error)")
    }

    init?(_ json: JSON) {
        guard let name = json["class"]?.stringValue, let words = json["desc"]?.stringValue else { return nil }
        self.init(words, class: Class(rawValue: name))
    }

    var json: JSON { ["class": .string(errorClass.rawValue), "desc": .string(description)] }
}

// MARK: The wording of QEMU

extension QMPError {
    static func missing(_ parameter: String) -> QMPError { QMPError("Parameter '\(parameter)' is missing") }

    static func unexpected(_ parameter: String) -> QMPError { QMPError("Parameter '\(parameter)' is unexpected") }

    /// A parameter whose value will not do: "Parameter 'cpus' expects a value between 1 and 64".
    public static func parameter(_ name: String, expects what: String) -> QMPError {
        QMPError("Parameter '\(name)' expects \(what)")
    }

    static func wrongType(_ parameter: String, expected: String) -> QMPError {
        QMPError("Invalid parameter type for '\(parameter)', expected: \(expected)")
    }

    static func unknownValue(_ value: String, of parameter: String) -> QMPError {
        QMPError("Parameter '\(parameter)' does not accept value '\(value)'")
    }

    static func commandNotFound(_ name: String) -> QMPError {
        QMPError("The command \(name) has not been found", class: .commandNotFound)
    }
}
