/// Which peers may come, once they have shown who they are: QEMU's `authz-simple` and `authz-list`.
///
/// A peer of x509 is named by its certificate's subject (`CN=host1,O=Example`), in the order of RFC 2253 or in the certificate's
/// own; one with a pre-shared key by its user name.
public struct TLSPeerList: Sendable, Equatable {
    public enum Policy: String, Sendable, CaseIterable { case allow, deny }
    public enum Format: String, Sendable, CaseIterable {
        case exact
        /// `*` stands for any text, `?` for one character.
        case glob
    }

    public struct Rule: Sendable, Equatable {
        public var match: String
        public var policy: Policy
        public var format: Format

        public init(_ match: String, policy: Policy, format: Format = .exact) {
            self.match = match
            self.policy = policy
            self.format = format
        }
    }

    /// The first that matches decides.
    public var rules: [Rule]
    /// For a peer that no rule matches.
    public var policy: Policy

    public init(rules: [Rule], policy: Policy = .deny) {
        self.rules = rules
        self.policy = policy
    }

    /// One peer and no other (`authz-simple`).
    public init(identity: String) {
        self.init(rules: [Rule(identity, policy: .allow)])
    }

    /// - Parameter names: the ways to write one and the same name.
    public func admits(_ names: [String]) -> Bool {
        let rule = rules.first { rule in
            names.contains { name in
                switch rule.format {
                case .exact: name == rule.match
                case .glob: Self.matches(Array(name.unicodeScalars)[...], Array(rule.match.unicodeScalars)[...])
                }
            }
        }
        return (rule?.policy ?? policy) == .allow
    }

    /// Goes on from the last `*` where the text does not fit: time grows with the product of both lengths at most.
    private static func matches(_ text: ArraySlice<Unicode.Scalar>, _ pattern: ArraySlice<Unicode.Scalar>) -> Bool {
        var text = text
        var pattern = pattern
        var retry: (text: ArraySlice<Unicode.Scalar>, pattern: ArraySlice<Unicode.Scalar>)?
        while true {
            if pattern.first == "*" {
                pattern = pattern.dropFirst()
                retry = (text, pattern)
            } else if let wanted = pattern.first, let character = text.first, wanted == "?" || wanted == character {
                text = text.dropFirst()
                pattern = pattern.dropFirst()
            } else if text.isEmpty, pattern.isEmpty {
                return true
            } else if let again = retry, !again.text.isEmpty {
                text = again.text.dropFirst()
                pattern = again.pattern
                retry = (text, pattern)
            } else {
                return false
            }
        }
    }
}
